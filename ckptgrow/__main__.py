"""python -m ckptgrow"""

from ckptgrow.cli import main

if __name__ == "__main__":
    main()
