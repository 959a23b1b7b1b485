"""Networks as users write them, with what is right for each."""

from benchmarks.coverage.checking import NETWORKS as NETWORKS
from benchmarks.coverage.checking import checked as checked
from benchmarks.coverage.users import cnn as cnn
from benchmarks.coverage.users import forward as forward
from benchmarks.coverage.users import heads as heads
from benchmarks.coverage.users import inputs as inputs
from benchmarks.coverage.users import outputs as outputs
from benchmarks.coverage.users import paths as paths
from benchmarks.coverage.users import tokens as tokens
