"""What setup.cfg cannot say: the C extension. Where it cannot be compiled, Pillow resizes."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "batchclf.images._resize",
            ["batchclf/images/_resize.c"],
            extra_compile_args=["-O3", "-g0"],
            py_limited_api=True,
            optional=True,
        )
    ]
)
