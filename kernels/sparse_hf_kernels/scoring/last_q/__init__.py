from sparse_hf_kernels.scoring.last_q.op import last_q_sums

__all__ = ["last_q_sums"]
