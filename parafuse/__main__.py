"""`python -m parafuse`: the command line."""

from parafuse.launch.cli import main

if __name__ == "__main__":
    main()
