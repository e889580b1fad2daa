"""`python -m lit_actreg` is `lit-actreg`."""

from lit_actreg.cli import main

if __name__ == "__main__":
    main()
