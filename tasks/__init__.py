"""The reference application: a competitor monitor on Byrd. It reads a rival's site, reports what changed, and tells."""
