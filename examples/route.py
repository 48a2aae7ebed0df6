"""Which machines would answer: routing over announcements that are made up here.

Nothing is connected and nothing is loaded: what chooses the machines is a pure function.

    python examples/route.py
"""

from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.route import Chain, find_chain
from pals.types import LayerRange, PeerId

MODEL = "friends/our-model"
MANIFEST = bytes(32)
NUM_LAYERS = 30


def announcement(peer: str, layers: str, step_ms: float) -> Announcement:
    """Return what a shard that serves ``layers`` of the model tells the swarm."""
    served = LayerRange.parse(layers)
    return Announcement(
        peer=PeerId(peer),
        model_id=MODEL,
        manifest=MANIFEST,
        layers=served,
        num_layers=NUM_LAYERS,
        layer_hashes=(bytes(16),) * len(served),
        dtype="bf16",
        free_tokens=16384,
        max_context_tokens=4096,
        step_ms=step_ms,
        addresses=(),
        seq=1,
        expires_at=float("inf"),
    )


SWARM = (
    announcement("tower", "0:20", 12.0),
    announcement("laptop", "20:30", 15.0),
    announcement("nas", "20:30", 60.0),
    announcement("desk", "0:10", 9.0),
    announcement("attic", "10:20", 9.0),
)


def choose(swarm: tuple[Announcement, ...]) -> Chain:
    """Return the best chain for one user."""
    return find_chain(swarm, manifest=MANIFEST, num_layers=NUM_LAYERS)


def show(title: str, chain: Chain) -> None:
    """Print the machines of a chain, and what it predicts."""
    print(f"{title}:")
    for hop in chain.hops:
        print(f"  {hop.peer:8} layers {hop.layers!s:6} {hop.step_ms:5.1f} ms")
    print(f"  a token takes {chain.step_ms:.1f} ms, so {1000 / chain.step_ms:.0f} tokens/s")


def main() -> None:
    """Choose a chain of all machines, then without one, then without two."""
    show("everybody is there", choose(SWARM))
    without_tower = tuple(shard for shard in SWARM if shard.peer != "tower")
    show("the tower is off", choose(without_tower))
    try:
        choose(tuple(shard for shard in without_tower if shard.peer != "attic"))
    except NoChain as error:
        print(f"the attic too: {error}")


if __name__ == "__main__":
    main()
