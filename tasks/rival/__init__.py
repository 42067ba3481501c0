"""A rival's web site for demos and tests: two versions of the same site, served on loopback."""

from tasks.rival.content import Change, Site, SitePage, expected_changes, load_site
from tasks.rival.server import RivalServer, Traffic

__all__ = ["Change", "RivalServer", "Site", "SitePage", "Traffic", "expected_changes", "load_site"]
