"""Environment that JAX and libtpu read once, before their first import: imported first by the package.

libtpu compiles for TPUs on machines that have none, so it is often installed on laptops and CI machines. There JAX
loads it all the same, it writes half a dozen warnings to stderr, and lets one process at a time compile (jax 0.10 to
0.12, libtpu 0.0.52). What is set here keeps it quiet and out of the way on exactly those machines. Nothing that the
user has set is changed, and with a TPU, a GPU or any other JAX plugin present the choice of platform stays JAX's.
"""

import glob
import importlib.util
import os
import sys

_GOOGLE_PCI_VENDOR = "0x1ae0"
_NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


def tpu_attached() -> bool:
    """Whether a TPU is on this machine's PCI bus, or handed into this container as a device file."""
    if glob.glob("/dev/accel*") or os.environ.get("TPU_NAME"):
        return True
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        try:
            with open(path) as file:
                if file.read().strip() == _GOOGLE_PCI_VENDOR and _is_tpu(os.path.dirname(path)):
                    return True
        except OSError:
            continue
    return False


def _is_tpu(device: str) -> bool:
    # Google's cloud gives its virtual disks (PCI class 0x01....) and network cards (0x02....) the same vendor.
    try:
        with open(os.path.join(device, "class")) as file:
            return not file.read().strip().startswith(("0x01", "0x02"))
    except OSError:
        return True


def _other_plugin() -> bool:
    """Whether another accelerator may be reached: an NVIDIA device file or a JAX plugin of any kind."""
    if any(os.path.exists(path) for path in _NVIDIA_DEVICES) or "PJRT_NAMES_AND_LIBRARY_PATHS" in os.environ:
        return True
    if importlib.util.find_spec("jax_plugins") is not None:
        return True
    from importlib.metadata import entry_points

    return bool(entry_points(group="jax_plugins"))


def configure() -> None:
    """Keep an idle libtpu quiet. Called once by `import jaxformers`."""
    if importlib.util.find_spec("libtpu") is None or tpu_attached() or "JAX_FORCE_TPU_INIT" in os.environ:
        return
    # Answers to what libtpu would ask the metadata server when it compiles for a topology. The topology that is
    # compiled for is always named by the caller; these values do not enter it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    # There is no chip to contend for: a second process may compile too (by default libtpu's lock file forbids it).
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "JAX_PLATFORMS" in os.environ or "JAX_PLATFORM_NAME" in os.environ or _other_plugin():
        return
    if "jax" in sys.modules:  # too late for the environment: JAX read it at its own import
        import jax

        if jax.config.jax_platforms is None:
            jax.config.update("jax_platforms", "cpu")
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"


configure()
