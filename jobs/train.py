"""Job: the arms of the experiment, trained. Its options are those of `fac-ray train`; see README.md."""

from fac_ray.cli import train

if __name__ == "__main__":
    train(prog_name="jobs/train.py")
