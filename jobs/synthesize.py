"""Job: verified texts for the missing features. Its options are those of `fac-ray synthesize`; see README.md."""

from fac_ray.cli import synthesize

if __name__ == "__main__":
    synthesize(prog_name="jobs/synthesize.py")
