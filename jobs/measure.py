"""Job: Coverage of every corpus. Takes the options of `fac-ray measure`; see README.md beside this file."""

from fac_ray.cli import measure

if __name__ == "__main__":
    measure(prog_name="jobs/measure.py")
