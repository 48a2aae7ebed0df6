"""The checks that every HTTP request passes before any route is looked up.

A browser can be made to send requests to localhost by any web page (DNS rebinding,
cross-site POST), so a loopback bind is not a protection by itself.
"""

from pals.api.gate.body import MAX_BODY_BYTES
from pals.api.gate.middleware import Gate
from pals.api.gate.settings import GateSettings
from pals.api.problems import JSON_TYPE

__all__ = ["JSON_TYPE", "MAX_BODY_BYTES", "Gate", "GateSettings"]
