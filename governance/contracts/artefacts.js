// SPDX-License-Identifier: Apache-2.0
//
// What is committed of a build of the contracts (scripts/contracts.sh): of each contract
// its interface, its code and where in it the constructor writes, and of all of them
// where their storage lies.
"use strict";
const fs = require("fs");
const path = require("path");

const contracts = ["DstackKms", "DstackApp", "Council", "ERC1967Proxy"];
const layouts = ["DstackKms", "DstackApp", "Namespaces"];

const built = (out, name) => {
	const file = { Namespaces: "Layout.t.sol", ForeignApp: "Foreign.sol" }[name] || name + ".sol";
	return JSON.parse(fs.readFileSync(path.join(out, file, name + ".json"), "utf8"));
};
const save = (file, value) => fs.writeFileSync(file, JSON.stringify(value, null, 1) + "\n");

const write = (out, dir) => {
	fs.mkdirSync(path.join(dir, "abi"));
	for (const name of contracts) {
		const b = built(out, name);
		save(path.join(dir, "abi", name + ".json"), {
			contractName: name,
			compiler: b.metadata.compiler.version,
			abi: b.abi,
			bytecode: b.bytecode.object,
			deployedBytecode: b.deployedBytecode.object,
			immutables: Object.values(b.deployedBytecode.immutableReferences || {}).flat(),
		});
	}
	// An app of other code, for tests.
	const { abi, bytecode } = built(out, "ForeignApp");
	fs.mkdirSync(path.join(dir, "testdata"));
	save(path.join(dir, "testdata", "ForeignApp.json"), { contractName: "ForeignApp", abi, bytecode: bytecode.object });

	const layout = {};
	for (const name of layouts) {
		const { storage, types } = built(out, name).storageLayout;
		// Types are named after numbers of the compiler's syntax tree, which any edit moves.
		const plain = (type) => type.replace(/(t_struct\(\w+\))\d+/g, "$1");
		const rows = (members) =>
			members.map((m) => {
				const row = { label: m.label, slot: m.slot, offset: m.offset, type: plain(m.type) };
				const inner = types[m.type].members;
				if (inner) row.members = rows(inner);
				return row;
			});
		layout[name] = rows(storage);
		for (const type of Object.values(types)) {
			if (!type.value) continue;
			const value = types[type.value];
			if (value.members) layout[name + ": " + value.label] = rows(value.members);
		}
	}
	save(path.join(dir, "storage-layout.json"), layout);
};

// The gas report's tables, as one table between two marks of the page.
const gas = (out, report, page) => {
	const rows = [];
	let contract = "";
	for (const line of fs.readFileSync(report, "utf8").split("\n")) {
		const cells = line.split("|").map((c) => c.trim());
		if (cells.length < 3) continue;
		const head = cells[1].match(/^src\/\w+\.sol:(\w+) Contract$/);
		if (head) contract = head[1];
		else if (/^\w+(\(.*\))?$/.test(cells[1]) && /^\d+$/.test(cells[2]) && contract && cells.length >= 7 && cells[6])
			rows.push([contract, cells[1], cells[2], cells[4], cells[5]]);
		else if (/ Contract$/.test(cells[1])) contract = "";
	}
	const mutating = new Set();
	for (const name of contracts.slice(0, 3))
		for (const f of built(out, name).abi)
			if (f.type === "function" && (f.stateMutability === "nonpayable" || f.stateMutability === "payable" || /^is(App|Kms)Allowed/.test(f.name)))
				mutating.add(name + "." + f.name);
	const table = ["| Contract | Function | Least | Median | Most |", "|---|---|---|---|---|"];
	for (const r of rows) if (mutating.has(r[0] + "." + r[1].replace(/\(.*/, ""))) table.push("| " + r.map((c, i) => (i === 1 ? "`" + c + "`" : c)).join(" | ") + " |");
	if (table.length < 10) throw new Error("the gas report was not understood");
	const text = fs.readFileSync(page, "utf8");
	const marks = /(<!-- gas -->\n)[^]*(<!-- \/gas -->)/;
	if (!marks.test(text)) throw new Error(page + " has no place for the table");
	fs.writeFileSync(page, text.replace(marks, (_, a, b) => a + table.join("\n") + "\n" + b));
};

const [mode, ...args] = process.argv.slice(2);
({ write, gas })[mode](...args);
