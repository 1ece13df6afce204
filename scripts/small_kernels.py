"""Runs the GPU kernels on small inputs, first each once, then every path: for compute-sanitizer.

Of vectors to be coded, those too long for registers come first: their kernel keeps them in scratch
memory of its own.
"""

import torch

from livrec_fast import kmeans_step, residual_kmeans_details, residual_kmeans_encode
from livrec_fast.reference import kmeans_step as step
from livrec_fast.reference.residual_kmeans import agree, agree_on_details
from livrec_fast.testing import check_forward, check_gradients, inputs_for, subjects

ATTENTION = (
    "target_attention",
    "code_attention",
    "code_attention_gradient",
    "history_search",
    "history_search_codes",
)


def each_once() -> None:
    """Run the GPU kernels of every other op, and their gradients, on its typical inputs."""
    for name, subject in subjects().items():
        if name in ATTENTION:
            continue
        inputs = inputs_for(subject.oracle, "typical", device="cuda")
        for kernel, reason in subject.op.reasons(*subject.arguments(inputs)).items():
            if kernel in ("cuda", "triton") and reason is None:
                check_forward(subject, kernel, inputs)
                if subject.op.differentiable:
                    check_gradients(subject, kernel, inputs)
                print(f"{name}, {kernel}: right", flush=True)


def attend() -> None:
    """Attend, differentiate it, and search, in every corner of the contract."""
    for name in ATTENTION:
        subject = subjects()[name]
        for case in subject.oracle.cases:
            for dtype in subject.oracle.dtypes:
                inputs = inputs_for(subject.oracle, case, dtype, device="cuda")
                check_forward(subject, "triton", inputs)
                if subject.op.reasons(*subject.arguments(inputs)).get("cuda", "absent") is None:
                    check_forward(subject, "cuda", inputs)
                if name == "target_attention":  # whose gradient has kernels of its own
                    check_gradients(subject, "triton", inputs)
        print(f"{name}: right", flush=True)


def main() -> None:
    """Run and hold the results to the contract."""
    each_once()
    for dim in (200, 129, 128, 100, 64, 20):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(dim)
            x = torch.randn(333, dim, generator=generator).to(dtype)
            books = [torch.randn(n, dim, generator=generator) for n in (70, 300, 5)]
            device_books = [book.cuda() for book in books]
            given = {"x": x, "codebooks": books}
            agree(residual_kmeans_encode(x.cuda(), device_books, backend="triton").cpu(), given)
            details = residual_kmeans_details(
                x.cuda(), device_books, reconstruction=True, second=True, backend="triton"
            )
            agree_on_details([output.cpu() for output in details], given)
            quanta = step.quanta_of(x, books[1], None)
            done = kmeans_step(x.cuda(), device_books[1], quanta=quanta.cuda(), backend="triton")
            given = {"x": x, "codebook": books[1], "quanta": quanta}
            step.agree(tuple(output.cpu() for output in done), given)
            print(f"D = {dim}, {dtype}: right", flush=True)
    attend()


if __name__ == "__main__":
    main()
