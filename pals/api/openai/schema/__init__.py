"""Requests and responses, field for field as OpenAI writes them.

Source: OpenAI's published OpenAPI schema; the docstrings name its components. A request
has some fields more, which other servers of open models have too: ``top_k``, ``min_p``,
``repetition_penalty`` and ``reasoning_content``.
"""
