"""The OpenAI-compatible endpoint over a driver."""

from pals.api.openai.app import build_openai_app

__all__ = ["build_openai_app"]
