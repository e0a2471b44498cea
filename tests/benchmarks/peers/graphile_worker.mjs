// A worker of Graphile Worker:
// node graphile_worker.mjs NODE_MODULES TASK CONCURRENCY LOCAL_QUEUE_SIZE COMPLETE_DELAY
// It keeps to what running.py says of a worker. Where to connect is in libpq's variables.
import { writeSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, task, concurrency, localQueue, delay] = process.argv.slice(2);
const load = (...path) => import(pathToFileURL(join(modules, ...path)).href);
const { Logger, run } = await load("graphile-worker", "dist", "index.js");
const { default: pg } = await load("pg", "lib", "index.js");

const TELL_MILLISECONDS = 10;

let handled = 0;
let told = 0;
const tell = () => {
  if (handled !== told) {
    told = handled;
    writeSync(1, `${told}\n`);
  }
};

const concurrentJobs = Number(concurrency);
const maxPoolSize = concurrentJobs + 1;
const pgPool = new pg.Pool({ max: maxPoolSize });
pgPool.on("error", () => process.exit(1));
const clients = await Promise.all(Array.from({ length: maxPoolSize }, () => pgPool.connect()));
clients.forEach((client) => client.release());

let going = false;
process.stdin.on("end", () => process.exit(1));
process.stdin.on("data", async () => {
  if (going) return;
  going = true;
  setInterval(tell, TELL_MILLISECONDS);
  const runner = await run({
    pgPool,
    noHandleSignals: true,
    parsedCronItems: [],
    taskList: { [task]: async () => void (handled += 1) },
    // Standard output is for the count.
    logger: new Logger(() => (level, message) => {
      if (level === "error" || level === "warning") console.error(message);
    }),
    preset: {
      worker: {
        concurrentJobs,
        maxPoolSize,
        localQueue: { size: Number(localQueue) },
        completeJobBatchDelay: Number(delay),
        failJobBatchDelay: Number(delay),
      },
    },
  });
  await runner.promise;
});
writeSync(1, "ready\n");
