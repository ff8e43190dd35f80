"""Train an SAE for any supported model on any corpora: a config comes in, a SAELens folder with its card goes out.

    corpora -> texts -> pool of backbones (Ray Data, in order) -> shuffle buffer -> SAELens' trainer (one process)
                                                                      `------ checkpoint ------'

Interrupted at any point, the same command goes on from the last checkpoint and ends in the weights of an uninterrupted
training: the order of texts, the batches and the optimizer's state are all those that they would have been.

    <run.folder>/sae_training/  texts.arrow  samples/  rejected/  checkpoints/
    <sae.path>/                 cfg.json  sae_weights.safetensors  card.json  card.md          appears whole, at the end
"""

from fac_ray.sae_training.course import train_sae

__all__ = ["train_sae"]
