"""The HTTP applications: the OpenAI endpoint and the membership service."""
