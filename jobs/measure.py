"""Job: coverage of every corpus. Its options are those of `fac-ray measure`; see README.md."""

from fac_ray.cli import measure

if __name__ == "__main__":
    measure(prog_name="jobs/measure.py")
