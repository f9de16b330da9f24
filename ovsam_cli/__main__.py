import sys

from ovsam_cli import main

sys.exit(main())
