"""Job: everything, from texts to the report. Its options are those of `fac-ray run`; see README.md."""

from fac_ray.cli import run

if __name__ == "__main__":
    run(prog_name="jobs/run.py")
