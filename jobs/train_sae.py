"""Job: an SAE for a config's model and corpora. Its options are those of `fac-ray sae train`; see README.md."""

from fac_ray.cli import sae_train

if __name__ == "__main__":
    sae_train(prog_name="jobs/train_sae.py")
