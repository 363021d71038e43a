"""Writes *.h5, *.mat and *.nc beside itself, for the tests of the reader: python3 make.py (needs h5py, netCDF4, scipy)."""
import pathlib
import h5py, netCDF4, numpy as np, scipy.io
here = pathlib.Path(__file__).parent
base = np.arange(24.0).reshape(2, 3, 4) / 4
for name, options in ("small", {}), ("latest", {"libver": "latest"}):
    with h5py.File(here / f"{name}.h5", "w", **options) as f:
        f["f64"], f["f32"], f["f16"] = base / 3, base.astype("f4"), base.astype("f2")
        f["big_f64"], f["big_i16"] = (base / 3).astype(">f8"), np.array([1, -2, 300], ">i2")
        f["i64"], f["u8"], f["bool"] = np.array([1, -2, 2**40]), np.array([0, 200], "u1"), base > 2
        f["c64"], f["c128"] = (base - 2j * base).astype("c8"), (base / 3 + 1j).astype(">c16")
        f["scalar"], f["empty"] = 2.5, np.zeros((0, 3))
        f["group/inner/f32"] = base[0].astype("f4")
        f["group/back"] = h5py.SoftLink("/group")
        f["f32"].attrs["unit"] = "m"
        for kind, more in (("plain", {}), ("gzip", {"compression": "gzip", "shuffle": True}), ("lzf", {"compression": "lzf"}),
                           ("checked", {"compression": "gzip", "fletcher32": True})):
            f.create_dataset(f"chunks/{kind}", data=base, chunks=(1, 2, 3), **more)
        f.create_dataset("chunks/grows", data=base, chunks=(1, 2, 3), maxshape=(None, 3, None))
        f.create_dataset("chunks/repeated", data=np.arange(1000) % 7, chunks=(300,), compression="lzf")
        f.create_dataset("filled", shape=(5, 2), dtype="f4", chunks=(2, 2), fillvalue=2.5)[4, 1] = 7
        f["text"], f["texts"], f["bytes"] = "no numbers", ["a", "bc"], np.array([b"a", b"bc"])
        f["record"] = np.zeros(2, [("a", "f4"), ("b", "i4")])
        f["nothing"] = h5py.Empty("f4")
        f["outside"], f["nowhere"] = h5py.ExternalLink("small.h5", "/f32"), h5py.SoftLink("/none")
        bfloat = h5py.h5t.IEEE_F16LE.copy()
        bfloat.set_fields(15, 7, 8, 0, 7), bfloat.set_ebias(127)
        f["bfloat"] = np.zeros(2, "f2")
        del f["bfloat"]
        h5py.h5d.create(f.id, b"bfloat", bfloat, h5py.h5s.create_simple((2,)))

with h5py.File(here / "block.h5", "w", userblock_size=1024) as f:
    f["f64"] = base / 3

# As MATLAB 7.3 writes: a header in a block of 512 bytes, axes last to first, classes as attributes.
with h5py.File(here / "v73.mat", "w", userblock_size=512) as f:
    def put(name, array, kind, **attributes):
        f[name] = array.T
        f[name].attrs["MATLAB_class"] = np.bytes_(kind)
        f[name].attrs.update(attributes)
    put("a", base, "double")
    put("u", base[..., 0].astype("f4"), "single")
    pairs = np.zeros((2, 3), [("real", "f8"), ("imag", "f8")])
    pairs["real"], pairs["imag"] = base[..., 1], -base[..., 2]
    put("z", pairs, "double")
    put("flag", np.array([[1, 0, 1]], "u1"), "logical", MATLAB_int_decode=np.int32(1))
    put("name", np.array([[104, 105]], "u2"), "char", MATLAB_int_decode=np.int32(2))
    put("none", np.array([0, 3], "u8"), "double", MATLAB_empty=np.uint8(1))
    f["#refs#/a"] = base
header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Sat Jan  1 00:00:00 2000 HDF5 schema 1.00 ."
with open(here / "v73.mat", "r+b") as f:
    f.write(header.ljust(116) + bytes(8) + b"\x00\x02IM")

scipy.io.savemat(here / "v5.mat", {"a": base[0]})
for name, form in ("four.nc", "NETCDF4"), ("classic.nc", "NETCDF3_CLASSIC"):
    with netCDF4.Dataset(here / name, "w", format=form) as f:
        f.createDimension("t", None), f.createDimension("x", 4)
        f.createVariable("x", "f8", ("x",))[:] = base[0, 0]
        f.createVariable("u", "f4", ("t", "x"))[:] = base[0]
