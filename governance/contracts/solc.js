#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
//
// solc from npm as forge wants it: a program that reads and writes standard JSON.
"use strict";
const fs = require("fs");
const solc = require(__dirname + "/node_modules/solc");
if (process.argv.includes("--version")) {
	const version = solc.version().replace("Emscripten.clang", "Linux.g++");
	console.log("solc, the solidity compiler commandline interface\nVersion: " + version);
} else {
	fs.writeFileSync(1, solc.compile(fs.readFileSync(0, "utf8")));
}
