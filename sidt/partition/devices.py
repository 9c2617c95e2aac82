"""The devices that a model is cut over: what each computes, holds and sends in a second."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Device(_Strict):
    """One device.

    Attributes:
        name: what it is called in tables and files.
        memory: bytes that it has for parameters.
        macs_per_second: multiply-adds that it does in a second; ``None``: as a worker on this machine does, measured.
        bandwidth: bytes that its link moves in a second, sent and received together; ``None``: measured here.
        latency: seconds until a message arrives, whatever its size.
        threads: of the worker that stands in for it on this machine.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # a part of a file's name
    memory: float = Field(gt=0, allow_inf_nan=False)
    macs_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    bandwidth: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    latency: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    threads: int = Field(default=1, ge=1)

    @property
    def capacity(self) -> float:
        """Multiply-adds a second, of a device that says them."""
        assert self.macs_per_second is not None, f"{self.name} was not measured"
        return self.macs_per_second

    @property
    def link(self) -> float:
        """Bytes a second, of a device that says them."""
        assert self.bandwidth is not None, f"{self.name} was not measured"
        return self.bandwidth


class DevicesFile(_Strict):
    """A file of devices.

    Attributes:
        devices: one or more, of different names; the first has the images.
    """

    devices: tuple[Device, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _apart(self) -> "DevicesFile":
        names = [device.name for device in self.devices]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two devices are called {twice[0]}; give each a name of its own")
        return self
