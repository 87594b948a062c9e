"""Generation at the speed of the decoding step: captured steps, and a loop that does not wait."""

from ssm_hf.generation.graphs import forget_graphs
from ssm_hf.generation.loop import decode
from ssm_hf.generation.prefill import Piece, cut, read_prompt
from ssm_hf.generation.select import Recipe, Request, read_request
from ssm_hf.generation.session import Session, current_session, open_session

__all__ = [
    "Piece",
    "Recipe",
    "Request",
    "Session",
    "current_session",
    "cut",
    "decode",
    "forget_graphs",
    "open_session",
    "read_prompt",
    "read_request",
]
