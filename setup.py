"""What setup.cfg cannot say: the C extension. Where it cannot be compiled, Pillow resizes."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "batchclf.images._resize",
            ["batchclf/images/_resize.c", "batchclf/images/_resize_kernels.c"],
            depends=["batchclf/images/_resize.h"],
            extra_compile_args=[
                *("-O3", "-g0", "-fvisibility=hidden"),
                # What an old compiler lacks is told here, not where the extension is loaded.
                "-Werror=implicit-function-declaration",
            ],
            py_limited_api=True,
            optional=True,
        )
    ]
)
