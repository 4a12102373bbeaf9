# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_mqa_sm90`: the command `vllm-mqa-sm90`."""

from vllm_mqa_sm90.cli import command

command()
