"""Drafts in vLLM's first model runner (the one of the CPU build, and of `VLLM_USE_V2_MODEL_RUNNER=0`).

Everything stays on the device; nothing waits for it. Shapes: B rows, K = drafts + 1 block positions, M drafts, V
vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from orthrus.integrations.vllm.block import Block, block_inputs, in_turn
from orthrus.integrations.vllm.model import OrthrusDraft


class OrthrusProposer(DraftModelProposer):
    """Draft with the target's own layers over the target's own cache."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.drafts: int = self.speculative_config.num_speculative_tokens
        self.mask: int = vllm_config.model_config.hf_config.mask_token_id
        # Stock drafters keep the target's hidden states and embeddings; this one has no use for either.
        self.hidden_states = self.inputs_embeds = torch.empty(0, device=device)

    def load_model(self, target_model: Any) -> None:
        """Take the view of the target; nothing is loaded.

        By itself the runner drafts for no row while one of them is near the longest text. Blocks end there by
        themselves (`block_inputs`), so no row has to keep the others from drafting.
        """
        self.model = OrthrusDraft(target_model)
        self._draft_attn_layer_names = self.model.attention_layers
        self.runner.effective_drafter_max_model_len = self.max_model_len + self.drafts

    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Run eagerly: this runner has no full graphs for drafters, and the target's pieces hold other weights."""
        self.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.NONE)

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        *,
        next_token_ids: Tensor,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: Any,
        num_rejected_tokens_gpu: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Return drafts `[B, M]`; their probabilities are then in `take_last_draft_probs`.

        `next_token_ids` are the anchors; for rows whose prompt is not finished, any token. `num_rejected_tokens_gpu` is
        how many of the step's tokens were refused, per row.
        """
        length_B = common_attn_metadata.seq_lens
        if num_rejected_tokens_gpu is not None:
            length_B = length_B - num_rejected_tokens_gpu
        block = self._block(length_B, next_token_ids, common_attn_metadata.block_table_tensor)
        hidden = self._draft_pass(block, common_attn_metadata)
        B, K = block.token_BK.shape
        hidden = hidden.view(B, K, -1)[:, : self.drafts].reshape(B * self.drafts, -1)
        tokens, probabilities = self._choose(hidden, next_token_ids, sampling_metadata)
        self._last_draft_probs = None
        if probabilities is not None:
            self._last_draft_probs = probabilities.view(B, self.drafts, -1).contiguous()
        return tokens.view(B, self.drafts)

    def _choose(self, hidden: Tensor, anchor_B: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """Return drafts `[B·M]` and, if they are drawn, their distributions `[B·M, V]`."""
        markov = self.model.markov
        if markov is None:
            drawn: tuple[Tensor, Tensor | None] = self._sample_draft_tokens(hidden, sampling_metadata)
            return drawn
        probabilities: list[Tensor | None] = []

        def choose(logits_BV: Tensor, _: int) -> Tensor:
            tokens, probability = self._sample_from_logits(logits_BV, sampling_metadata)
            probabilities.append(probability)
            return tokens

        logits_BMV = self.model.compute_logits(hidden).unflatten(0, (-1, self.drafts))
        tokens = in_turn(logits_BMV, anchor_B, markov, choose).flatten()
        kept = [p for p in probabilities if p is not None]
        return tokens, torch.stack(kept, dim=1).flatten(0, 1) if kept else None

    def _block(self, length_B: Tensor, anchor_B: Tensor, page_BN: Tensor) -> Block:
        pages = self.runner.input_batch.block_table[self.kv_cache_gid]
        room_B = pages.num_blocks_per_row[: len(length_B)] * pages.block_size
        return block_inputs(
            length_B,
            anchor_B,
            async_tensor_h2d(room_B, device=self.device),
            page_BN,
            drafts=self.drafts,
            page_size=self.block_size,
            mask=self.mask,
            longest=self.max_model_len,
        )

    def _draft_pass(self, block: Block, verified: CommonAttentionMetadata) -> Tensor:
        """Run the view over the block, every position seeing prefix and block; returns hidden states `[B·K, C]`."""
        B, K = block.token_BK.shape
        slots = block.slot_BK.flatten()
        upper_B = verified.seq_lens_cpu_upper_bound
        metadata = CommonAttentionMetadata(
            query_start_loc=self.arange[: B + 1] * K,
            query_start_loc_cpu=torch.arange(B + 1, dtype=torch.int32) * K,
            seq_lens=block.seen_B.int(),
            num_reqs=B,
            num_actual_tokens=B * K,
            max_query_len=K,
            max_seq_len=min(verified.max_seq_len + K, self.max_model_len),
            block_table_tensor=verified.block_table_tensor,
            slot_mapping=slots,
            causal=False,
            seq_lens_cpu_upper_bound=None if upper_B is None else (upper_B[:B] + K).clamp(max=self.max_model_len),
        )
        _, per_layer = self.build_per_group_and_layer_attn_metadata(metadata)
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=B * K,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots),
        ):
            return self.model(block.token_BK.flatten().int(), block.position_BK.flatten())

    @torch.inference_mode()
    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Take the memory that a full draft pass takes, for vLLM's profile; nothing is written."""
        count = min(num_tokens, self.max_batch_size * (self.drafts + 1))
        tokens = torch.zeros(count, dtype=torch.int32, device=self.device)
        with set_forward_context(None, self.vllm_config, num_tokens=count, slot_mapping={}):
            hidden = self.model(tokens, tokens.long())
        self._greedy_sample(hidden)
