"""python -m tcw."""

from tcw.cli import main

if __name__ == "__main__":
    main()
