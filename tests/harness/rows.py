"""One row of a run's metrics, for tests of those who show or write it."""

from nanogpt.monitor.loggers import Row

ROW = Row(
    step=10, tokens=10_240, loss=1.5, lr=6e-4, grad_norm=0.7, tokens_per_s=650.0, step_s=1.6, mfu=0.41,
    eta_s=600.0, eta_low_s=300.0, eta_high_s=7200.0, eta_note=None, wall_s=15.8, memory_bytes=4_000_000_000,
    full_pass_loss=None, full_pass_recall=None, fastest_rank_step_s=1.5, slowest_rank_step_s=1.5,
    slowest_rank=0, slowest_rank_host="node0", slowest_rank_ratio=1.0, time_share={"compute": 0.9},
)  # fmt: skip
