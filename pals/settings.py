"""What a preset may say, with its defaults: one TOML file in configs/.

`pals.config.load_settings` reads one.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pals.errors import InvalidConfig
from pals.types import (
    AttentionChoice,
    Dtype,
    EngineLimits,
    GroupSize,
    PrefillCodec,
    Quantization,
    parse_bytes,
)

_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
_Places = Annotated[int, msgspec.Meta(ge=1, le=4096)]
_PlacesOrNone = Annotated[int, msgspec.Meta(ge=0, le=4096)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
_StaleSeconds = Annotated[float, msgspec.Meta(ge=300, le=30 * 86400)]
_Devices = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_SecondsOrNone = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the membership service listens."""

    host: str = "127.0.0.1"
    port: _Port = 8470


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the OpenAI endpoint listens, to whom, and how much at once."""

    host: str = "127.0.0.1"
    port: _Port = 8080
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    api_key_file: str = ""
    max_running: _Places = 64
    max_waiting: _PlacesOrNone = 64


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The libp2p side of ``pals shard`` and ``pals serve``."""

    listen: str = "/ip4/0.0.0.0/tcp/0"
    redeem_listen: str = "/ip4/0.0.0.0/tcp/8471"
    peers: tuple[str, ...] = ()
    mdns: bool = False
    gossip: bool = True
    table_requests: bool = True
    prefill_codec: PrefillCodec = "raw"
    announce: tuple[str, ...] = ()
    upnp: bool = True
    allow_relay: bool = False
    use_relay: bool = False
    poll_interval_s: _Seconds = 27.0
    max_stale_s: _StaleSeconds = 86400.0
    step_deadline_s: _Seconds = 30.0
    wait_for_peers_s: _SecondsOrNone = 30.0
    session_idle_s: _Seconds = 120.0
    drain_s: _SecondsOrNone = 20.0


class ShardSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a shard reserves."""

    dtype: Dtype = "bf16"
    int4_group_size: GroupSize = 128
    quantize_activations: bool = True
    devices: _Devices = 1
    attention: AttentionChoice = "auto"
    max_sessions: int = 256
    max_rows: int = 64
    max_context_tokens: int = 131072
    max_chunk_tokens: int = 512
    verify_tokens: int = 1
    page_tokens: int = 64
    kv_memory: str = ""
    prefill_share: float = 0.25

    def limits(
        self,
        *,
        sessions: int | None = None,
        rows: int | None = None,
        context: int | None = None,
        kv_bytes: int | None = None,
        prefill_share: float | None = None,
    ) -> EngineLimits:
        """Return what a shard reserves and compiles: what is named here, and the settings.

        Raises:
            InvalidConfig: ``kv_memory`` is no size.
        """
        return EngineLimits(
            max_sessions=sessions or self.max_sessions,
            max_rows=rows or self.max_rows,
            max_context_tokens=context or self.max_context_tokens,
            max_chunk_tokens=self.max_chunk_tokens,
            verify_tokens=self.verify_tokens,
            page_tokens=self.page_tokens,
            kv_bytes=kv_bytes or self._kv_bytes(),
            prefill_share=prefill_share or self.prefill_share,
        )

    def _kv_bytes(self) -> int | None:
        try:
            return parse_bytes(self.kv_memory) if self.kv_memory else None
        except ValueError as error:
            advice = 'write "512MiB", or "" for what the memory plan leaves'
            raise InvalidConfig(
                source="shard.kv_memory", problem=str(error), advice=advice
            ) from None

    @property
    def quantization(self) -> Quantization:
        return Quantization(group_size=self.int4_group_size, activations=self.quantize_activations)


class DemoSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``pals demo`` starts."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    prompt: str = "What is the capital of France? Answer in one sentence."
    max_tokens: int = 64
    layers: tuple[str, ...] = ()


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A preset: one TOML file in configs/, over which flags and variables win."""

    backend: BackendSettings = BackendSettings()
    serve: ServeSettings = ServeSettings()
    node: NodeSettings = NodeSettings()
    shard: ShardSettings = ShardSettings()
    demo: DemoSettings = DemoSettings()
