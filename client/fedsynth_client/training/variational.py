"""Training of a variational autoencoder of slices (`fedsynth.models.vae`): the encoder stays at the site, the decoder is the
study's generator.

Both see patients, so a patient's gradient is one vector over the parameters of both: clipped as one, noised as one. There
is no fake and no discriminator, and every loss is one of patients: nothing but the released weights can be told.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.dp.step import PatientTensors
from fedsynth.models.adapters import merged_state
from fedsynth.models.vae import Encoder, ImageVAE, vae_losses
from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.block import BlockResult, update_norm
from fedsynth_client.training.images import Drawn, ImagePatients, Showing, showing
from fedsynth_client.training.learner import Group, Learner, Optimised
from fedsynth_client.training.networks import kept, shared_generator, site_network


def train_vae(
    plan: StudyPlan,
    generator_weights: State,
    local: State,
    profiles: SyntheticProfiles,
    patients: ImagePatients,
    mechanism: Mechanism,
    randomness: Randomness,
    first_step: int,
) -> BlockResult:
    """One block of private steps of encoder and decoder; arguments as of `adversarial.train_gan`.

    The decoder's moments start anew in each block, since it was averaged over sites; the encoder's are kept.
    """
    gan = plan.gan
    show = showing(plan, profiles, patients, randomness)
    decoder, to_move = shared_generator(plan, generator_weights, show.public)
    encoder, trained = site_network(plan, local, show.public)
    assert isinstance(encoder, Encoder)
    both = ImageVAE(encoder, decoder)
    optimised = Optimised(gan, Group(trained, gan.learning_rate, local), Group(to_move, gan.generator_learning_rate))
    learner = Learner(plan, both, optimised, mechanism, randomness)

    def losses(model: nn.Module, real: Tensor, code: Tensor, noise: Tensor) -> Tensor:
        return vae_losses(model, real, code, noise, gan.kl_weight)

    for step in range(first_step, first_step + mechanism.steps):
        learner.at(step, trained, to_move)
        drawn = show.draw(mechanism.sample_rate, None, randomness)
        learner.step(len(drawn), _tensors(show, drawn), losses)
    after = merged_state(decoder)
    return BlockResult(
        after,
        {"update_norm": update_norm(generator_weights, after)},
        {**kept(encoder), **optimised.moments(trained)},
    )


def _tensors(show: Showing, drawn: Drawn) -> PatientTensors:
    """(p, k, ...) of drawn patients: slices, conditions, noise of the reparameterisation."""
    noise = show.noise(drawn, show.plan.gan.latent_dim)

    def tensors(positions: Tensor) -> Sequence[Tensor]:
        own = [tensor.unflatten(0, (len(positions), -1)) for tensor in show.slices(drawn, positions, None)]
        return [*own, noise[positions]]

    return tensors
