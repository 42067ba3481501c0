"""What must hold in Byrd's tables at any moment: the rules that users' tests check, too."""

from byrd.testing.invariants import RULES, broken_invariants, check_database, check_invariants

__all__ = ["RULES", "broken_invariants", "check_database", "check_invariants"]
