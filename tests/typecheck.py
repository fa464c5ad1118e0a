"""How calls are checked under pytest: an int will do where a float is asked for, as for mypy."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
