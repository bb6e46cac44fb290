"""The routes of the endpoint, one router per subject; ``serve.app`` puts them together."""
