"""What a Docker engine changes in its machine's network, and how it was before: rules of the packet filter,
forwarding, interfaces."""

from dataclasses import dataclass
from pathlib import Path

from tests.compose.shell import Shell

COMMAND_DEADLINE_S = 20.0
FAMILIES = ("iptables", "ip6tables")
FORWARDING = (
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/default/forwarding",
)
SYSCTLS = Path("/proc/sys")
INTERFACES = Path("/sys/class/net")
ENGINES_INTERFACES = ("docker", "br-", "veth")


@dataclass(frozen=True)
class HostNetwork:
    """`rules` as `iptables-save` prints them, by family; `forwarding` by its path under /proc/sys."""

    rules: dict[str, str]
    forwarding: dict[str, str]
    interfaces: frozenset[str]


async def read_host_network(shell: Shell) -> HostNetwork:
    """How it is now."""
    rules = {}
    for family in FAMILIES:
        saved = await shell.says(f"{family}-save", timeout_s=COMMAND_DEADLINE_S)
        if saved is not None:
            rules[family] = saved
    forwarding = {name: (SYSCTLS / name).read_text() for name in FORWARDING if (SYSCTLS / name).exists()}
    return HostNetwork(rules, forwarding, _interfaces())


def _interfaces() -> frozenset[str]:
    return frozenset(path.name for path in INTERFACES.iterdir() if path.is_symlink())


async def put_back(shell: Shell, before: HostNetwork) -> None:
    """Make it as it was `before` an engine that has ended since. Raises CommandFailed."""
    now = await read_host_network(shell)
    for interface in sorted(now.interfaces - before.interfaces):
        if interface.startswith(ENGINES_INTERFACES):
            await shell.run("ip", "link", "delete", interface, timeout_s=COMMAND_DEADLINE_S)
    for family, rules in now.rules.items():
        wanted = before.rules.get(family, "")
        if meaning(rules) != meaning(wanted):
            emptied = "".join(emptied_tables(rules, besides=wanted))
            await shell.run(f"{family}-restore", timeout_s=COMMAND_DEADLINE_S, stdin=wanted + emptied)
    for name, value in before.forwarding.items():
        if (SYSCTLS / name).read_text() != value:
            (SYSCTLS / name).write_text(value)


def differences(before: HostNetwork, now: HostNetwork) -> list[str]:
    """What is not as it was before, in words."""
    found = [f"interface {name}" for name in sorted(now.interfaces - before.interfaces)]
    for family in sorted(now.rules):
        was = set(meaning(before.rules.get(family, "")))
        found += [f"{family} rule {rule}" for rule in meaning(now.rules[family]) if rule not in was]
        gone = was - set(meaning(now.rules[family]))
        found += [f"{family} rule gone: {rule}" for rule in sorted(gone)]
    for name, value in now.forwarding.items():
        if before.forwarding.get(name) != value:
            found.append(f"{name} is {value.strip()}")
    return found


def meaning(rules: str) -> list[str]:
    """The lines of `rules` that do something, each with its table; chains that only accept do not."""
    table, lines = "", []
    for line in rules.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            if policy != "ACCEPT":
                lines.append(f"{table} {chain} {policy}")
        elif line.startswith("-"):
            lines.append(f"{table} {line}")
    return lines


def emptied_tables(rules: str, *, besides: str) -> list[str]:
    """Input for `iptables-restore` that empties the tables of `rules` which `besides` does not have."""
    kept = {line for line in besides.splitlines() if line.startswith("*")}
    texts = []
    for text in rules.split("COMMIT\n"):
        lines = [line for line in text.splitlines() if line.startswith(("*", ":"))]
        if not lines or lines[0] in kept:
            continue
        chains = [line.split()[0] for line in lines[1:] if line.split()[1] != "-"]
        texts.append("\n".join([lines[0], *(f"{chain} ACCEPT [0:0]" for chain in chains), "COMMIT", ""]))
    return texts
