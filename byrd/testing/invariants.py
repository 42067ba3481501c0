"""What must hold in Byrd's tables at any moment, for tests: the rules are the store's."""

from byrd.store.invariants import RULES, broken_invariants, check_database, check_invariants

__all__ = ["RULES", "broken_invariants", "check_database", "check_invariants"]
