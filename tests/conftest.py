"""What holds for every test: it must be set before torch is loaded anywhere."""

from __future__ import annotations

import os

# Threads that wait for one another sleep instead of spinning. Beside another busy process, spinning made one test that
# trains for seconds take minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
