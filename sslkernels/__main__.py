import sys

from sslkernels.cli import main

sys.exit(main())
