"""Job: Verified texts for the missing features. Takes the options of `fac-ray synthesize`; see README.md beside this file."""

from fac_ray.cli import synthesize

if __name__ == "__main__":
    synthesize(prog_name="jobs/synthesize.py")
