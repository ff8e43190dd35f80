"""Job: The arms of the experiment, trained; what comes before them too. Takes the options of `fac-ray train`; see README.md beside this file."""

from fac_ray.cli import train

if __name__ == "__main__":
    train(prog_name="jobs/train.py")
