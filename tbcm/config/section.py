"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NonNegativeInt = Annotated[int, Field(ge=0)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Switch = Literal["auto"] | bool
TangentMode = Literal["one_pass", "two_pass"]
Derivative = Literal["dual", "jvp"]
Checkpointing = Literal["none", "selective", "full"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
