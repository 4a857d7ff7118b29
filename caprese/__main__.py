"""python -m caprese, and accelerate launch -m caprese."""

from caprese.cli import run

if __name__ == "__main__":
    run()
