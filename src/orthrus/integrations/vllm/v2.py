"""Drafts in vLLM's Model Runner V2 (its default on GPUs), eagerly or in full CUDA graphs.

The block is laid into the buffers that a captured graph reads, and its slots into the runner's own slot buffer, which
the next step fills anew on the same stream. Written against vLLM 0.32.0; not yet run: the CPU build has no V2 runner.

Shapes: B rows, R rows with padding, K = drafts + 1 block positions, M drafts.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.dflash.cudagraph import DFlashCudaGraphManager
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from orthrus.errors import ConfigError
from orthrus.integrations.vllm.block import NO_SLOT, block_inputs, in_turn
from orthrus.integrations.vllm.model import OrthrusDraft

_log = logging.getLogger("vllm.orthrus")


class OrthrusSpeculator(DraftModelSpeculator):
    """Draft with the target's own layers over the target's own cache."""

    draft_attn_layer_names: set[str]

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        M = self.num_speculative_steps
        self.num_query_per_req = M + 1
        self.mask: int = vllm_config.model_config.hf_config.mask_token_id
        rows = torch.arange(self.max_num_reqs, device=device)[:, None] * (M + 1)
        # The block's last position predicts a token that no view was trained to draft.
        self.sampled = (rows + torch.arange(M, device=device)).flatten()
        self.column = torch.arange(M, dtype=torch.int32, device=device).repeat(self.max_num_reqs)
        self.query_starts = torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device) * (M + 1)
        self.graphs: DFlashCudaGraphManager | None = None

    def load_draft_model(self, target_model: Any, target_attn_layer_names: set[str]) -> nn.Module:
        """Take the view of the target; nothing is loaded, and no layer or cache is added."""
        return OrthrusDraft(target_model)

    def set_attn(self, model_state: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the draft pass's own metadata builders, over the target's layers.

        Raises ConfigError: the layers' cache is split into several groups.
        """
        groups = len(kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise ConfigError(f"drafts need one group of cache layers, found {groups}: serve the checkpoint plainly")
        before = self.draft_attn_layer_names  # none, and the runner relies on that
        self.draft_attn_layer_names = self.model.attention_layers
        super().set_attn(model_state, kv_cache_config, *args, **kwargs)
        self.draft_attn_layer_names = before

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Plan full graphs where the runner wants them and attention can be captured with several queries per row."""
        wanted = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        able = self.attn_cg_support.min_cg_support.value >= AttentionCGSupport.UNIFORM_BATCH.value
        if wanted and not able:
            _log.warning("Orthrus: %s has no full CUDA graphs; drafting eagerly", self.attn_cg_support)
        mode = CUDAGraphMode.FULL_DECODE_ONLY if wanted and able else CUDAGraphMode.NONE
        self.graphs = DFlashCudaGraphManager(
            self.vllm_config, self.device, mode, decode_query_len=self.num_query_per_req
        )

    def capture(self) -> None:
        """Capture the draft pass for every planned number of rows; padding writes nothing and is drawn for no one."""
        assert self.graphs is not None
        self.idx_mapping.fill_(-1)
        self.graphs.capture(
            self._draft_pass,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            self.max_model_len,
            causal=False,
            prepare_forward=self._refresh_metadata,
            progress_bar_desc="Capturing Orthrus draft CUDA graphs",
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Any,
        temperature: Tensor,
        seeds: Tensor,
        *,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        is_profile: bool = False,
        **unused: Any,
    ) -> Tensor:
        """Return drafts `[B, M]`, on the device.

        Rows whose prompt is not finished are drafted for too: their anchor is any token, their drafts are dropped, and
        the next chunk of the prompt overwrites what they wrote.
        """
        B, K = input_batch.num_reqs, self.num_query_per_req
        self._copy_request_inputs(B, input_batch.idx_mapping, temperature, seeds, dummy_run)
        if dummy_run and skip_attn_for_dummy_run:
            self._draft_pass(B, B * K, None, None, None)
            return self.draft_tokens[:B]
        self._lay_block(input_batch, num_rejected, last_sampled, dummy_run)
        upper_B = input_batch.seq_lens_cpu_upper_bound
        self.draft_max_seq_len = min(int(upper_B[:B].max()) + K, self.max_model_len)
        batch, _ = dispatch_cg_and_sync_dp(
            self.graphs, B, B * K, uniform_token_count=K, dp_size=1, dp_rank=0, need_eager=is_profile
        )
        in_graph = batch.cg_mode == CUDAGraphMode.FULL
        metadata = None
        if not (in_graph and self.supports_decode_metadata_update):
            # Builders refresh the buffers that a captured graph reads, so this serves replays too.
            metadata = self._build_uniform_attn_metadata(batch, B, K, upper_B, step=K, causal=False)
        if in_graph:
            assert self.graphs is not None
            self.graphs.run_fullgraph(batch)
        else:
            slots = build_slot_mappings_by_layer(
                self.block_tables.slot_mappings[:, : batch.num_tokens], self.kv_cache_config
            )
            self._draft_pass(B, batch.num_tokens, metadata, slots, None, batch.cg_mode)
        return self.draft_tokens[:B]

    def _lay_block(self, batch: InputBatch, num_rejected: Tensor, last_sampled: Tensor, dummy: bool) -> None:
        """Write the block into the persistent buffers; rows of padding see nothing and write nothing."""
        B, K = batch.num_reqs, self.num_query_per_req
        tables, buffers = self.block_tables, self.input_buffers
        # Read on the host: on the device the next step's counts may be there already.
        pages_B = tables.num_blocks.np[0, batch.idx_mapping_np[:B]] * (0 if dummy else 1)
        block = block_inputs(
            batch.seq_lens[:B] - num_rejected[:B],
            last_sampled.view(-1)[batch.idx_mapping[:B]],
            async_tensor_h2d(pages_B * tables.block_sizes[0], device=self.device),
            tables.input_block_tables[0][:B],
            drafts=self.num_speculative_steps,
            page_size=tables.block_sizes[0],
            mask=self.mask,
            longest=self.max_model_len,
        )
        buffers.input_ids[: B * K] = block.token_BK.flatten()
        buffers.positions[: B * K] = block.position_BK.flatten()
        buffers.seq_lens[:B] = block.seen_B
        buffers.seq_lens[B:] = 0
        buffers.query_start_loc.copy_(self.query_starts.clamp(max=B * K))
        slots = tables.slot_mappings[0]
        slots[: B * K] = block.slot_BK.flatten()
        slots[B * K :] = NO_SLOT

    def _draft_pass(
        self,
        rows: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, Tensor] | None,
        num_tokens_across_dp: Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    ) -> None:
        """Run the view over the buffers and sample every row's drafts; what a graph captures."""
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
            num_tokens_across_dp=num_tokens_across_dp,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        ):
            hidden = self.model(self.input_buffers.input_ids[:num_tokens], self.input_buffers.positions[:num_tokens])
        M, markov = self.num_speculative_steps, self.model.markov
        sampled = self.sampled[: rows * M]
        positions, columns = self.input_buffers.positions[sampled], self.column[: rows * M]

        def draw(states: Tensor, part: slice, count: int) -> Tensor:
            drawn: Tensor = self.sample_draft(
                states,
                positions[part],
                self.idx_mapping[:rows].repeat_interleave(count),
                self.temperature,
                self.seeds,
                columns[part],
                self.draft_logits,
            )
            return drawn

        if markov is None:
            self.draft_tokens[:rows] = draw(hidden[sampled], slice(None), M).view(rows, M)
            return
        logits_BMV = self.model.compute_logits(hidden[sampled]).view(rows, M, -1)
        anchor_B = self.input_buffers.input_ids[: rows * (M + 1) : M + 1]
        self.draft_tokens[:rows] = in_turn(
            logits_BMV, anchor_B, markov, lambda logits_BV, slot: draw(logits_BV, slice(slot, None, M), 1)
        )

    def compute_draft_logits(self, hidden_states: Tensor, spec_step_idx: int) -> Tensor:
        """Return logits; where slots are drawn in turn, what comes here are logits already."""
        if self.model.markov is not None:
            return hidden_states
        logits: Tensor = super().compute_draft_logits(hidden_states, spec_step_idx)
        return logits

    def get_draft_top_tokens(self, hidden_states: Tensor, spec_step_idx: int) -> Tensor:
        """Return the likeliest tokens, of logits as `compute_draft_logits` has them."""
        if self.model.markov is not None:
            return hidden_states.argmax(dim=-1)
        tokens: Tensor = super().get_draft_top_tokens(hidden_states, spec_step_idx)
        return tokens

    def _refresh_metadata(self, rows: int, attn_metadata: dict[str, Any] | None) -> None:
        """Let a replay refresh attention's own schedule from the buffers, where the backend can."""
        if attn_metadata is not None and self.supports_decode_metadata_update:
            self._update_draft_decode_metadata(attn_metadata, rows)
