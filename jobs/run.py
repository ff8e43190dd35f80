"""Job: Everything, from texts to the report. Takes the options of `fac-ray run`; see README.md beside this file."""

from fac_ray.cli import run

if __name__ == "__main__":
    run(prog_name="jobs/run.py")
