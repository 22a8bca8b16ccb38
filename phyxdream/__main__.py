"""`python -m phyxdream`: the command line, where the console script is not on the path."""

from phyxdream.cli import entry

if __name__ == "__main__":
    entry()
