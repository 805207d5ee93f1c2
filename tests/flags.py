"""What XLA is told in tests, which compile much and run little: imported before JAX is."""

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
