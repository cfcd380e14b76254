"use strict";

const find = (selector) => document.querySelector(selector);
const views = [...document.querySelectorAll("main")];
let form; // of this rater, as the server gives it
let rater;
let place = { page: 0, question: 0 };
let loaded = false; // the page's pictures are there
let sending = false; // an answer is on its way

function view(id) {
  for (const main of views) main.hidden = main.id !== id;
}

function fail(message) {
  for (const line of document.querySelectorAll(".failure")) line.textContent = message;
}

async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  if (!response.ok) throw new Error(`Not done: ${(await response.text()).trim()}`);
  return response.json();
}

// -- where we are -----------------------------------------------------------------------------------------------------

const isAnswered = ({ page, question }) => form.questions[question].criterion in form.items[page].answers;
const step = ({ page, question }, by) => {
  const index = page * form.questions.length + question + by;
  return { page: Math.floor(index / form.questions.length), question: index % form.questions.length };
};
const isInside = ({ page }) => page >= 0 && page < form.items.length;

/** The first question without an answer, from here on and then from the beginning; null: all have one. */
function nextOpen() {
  const total = form.items.length * form.questions.length;
  for (let i = 0; i < total; i++) {
    const index = (place.page * form.questions.length + place.question + i) % total;
    const there = step({ page: 0, question: 0 }, index);
    if (!isAnswered(there)) return there;
  }
  return null;
}

// -- one question -----------------------------------------------------------------------------------------------------

function show(there) {
  const newPage = !isInside(there) || there.page !== place.page || find("#page").hidden;
  place = there;
  fail("");
  view("page");
  if (newPage) {
    showPictures(form.items[place.page]);
    scrollTo(0, 0);
  }
  const { criterion, text, hint } = form.questions[place.question];
  const count = form.questions.length;
  const answered = form.items.reduce((sum, item) => sum + Object.keys(item.answers).length, 0);
  find("#page").dataset.criterion = criterion;
  find("#number").textContent = `${place.question + 1}/${count}`;
  find("#text").textContent = text;
  find("#hint").textContent = hint;
  find("#progress").textContent = `page ${place.page + 1} of ${form.items.length}`;
  find("progress").value = answered / (form.items.length * count);
  find("#back").disabled = !isInside(step(place, -1));
  find("#forward").disabled = !isAnswered(place);
  showAnswer();
}

function showAnswer() {
  const item = form.items[place.page];
  const { criterion } = form.questions[place.question];
  const chosen = item.answers[criterion]; // undefined: none yet
  find("#choices").replaceChildren(
    ...[...item.candidates, null].map((choice, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = choice === null ? "cannot tell" : `${index + 1}`;
      button.classList.toggle("tie", choice === null);
      button.setAttribute("aria-pressed", `${chosen === choice}`);
      button.disabled = !loaded || sending;
      button.onclick = () => vote(choice);
      return button;
    }),
  );
  [...find("#candidates").children].forEach((figure, index) => {
    figure.classList.toggle("chosen", item.candidates[index] === chosen);
  });
}

async function showPictures(item) {
  loaded = false;
  find("#prompt").textContent = `“${item.prompt}”`;
  find("#candidates").replaceChildren(
    ...item.candidates.map((_, index) => {
      const figure = find("#prior").cloneNode(true);
      figure.removeAttribute("id");
      figure.querySelector("img").alt = `picture ${index + 1}`;
      figure.querySelector("figcaption").textContent = `${index + 1}`;
      return figure;
    }),
  );
  find("#candidates").style.setProperty("--count", item.candidates.length);
  find("#keys").textContent = `keys 1 to ${item.candidates.length}, 0: cannot tell, ←: back; a click enlarges a picture`;
  const images = [...document.querySelectorAll("#page figure img")];
  const ids = [item.reference, item.prior, ...item.candidates];
  images.forEach((image, index) => {
    image.src = `picture/${ids[index]}`;
    image.parentElement.onclick = () => enlarge(image);
  });
  try {
    await Promise.all(images.map((image) => image.decode()));
  } catch {
    if (item === form.items[place.page]) fail("A picture cannot be loaded; load the page again.");
    return;
  }
  if (item !== form.items[place.page]) return; // gone on in the meantime
  loaded = true;
  showAnswer();
  const next = form.items[place.page + 1];
  for (const id of next ? [next.reference, next.prior, ...next.candidates] : []) new Image().src = `picture/${id}`;
}

async function vote(choice) {
  if (!loaded || sending) return;
  sending = true;
  showAnswer();
  const item = form.items[place.page];
  const { criterion } = form.questions[place.question];
  fail("");
  try {
    await ask("vote", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ rater, item: item.item, criterion, choice }),
    });
    item.answers[criterion] = choice;
  } catch (error) {
    fail(error.message);
    return;
  } finally {
    sending = false;
    showAnswer();
  }
  goOn();
}

function goOn() {
  const there = nextOpen();
  if (there) show(there);
  else view("end");
}

function enlarge(image) {
  find("#large img").src = image.src;
  find("#large img").alt = image.alt;
  find("#large").showModal();
}

// -- what a rater does ------------------------------------------------------------------------------------------------

function back() {
  if (!sending && isInside(step(place, -1))) show(step(place, -1));
}

function forward() {
  if (sending || !isAnswered(place)) return;
  if (isInside(step(place, 1))) show(step(place, 1));
  else goOn();
}

function leave() {
  if (sending) return;
  sessionStorage.removeItem("rater");
  find("#name").value = "";
  fail("");
  view("start");
  find("#name").focus();
}

async function begin(name) {
  try {
    form = await ask(`form?rater=${encodeURIComponent(name)}`);
  } catch (error) {
    fail(error.message);
    return;
  }
  rater = name;
  find("#rater").textContent = name;
  sessionStorage.setItem("rater", name);
  place = { page: 0, question: 0 };
  goOn();
}

find("#start form").onsubmit = (event) => {
  event.preventDefault();
  begin(find("#name").value);
};
find("#back").onclick = back;
find("#forward").onclick = forward;
find("#rater").onclick = leave;
find("#another").onclick = leave;
find("#review").onclick = () => show({ page: 0, question: 0 });
find("#large button").onclick = () => find("#large").close();

document.addEventListener("keydown", (event) => {
  const busy = find("#page").hidden || find("#large").open || event.ctrlKey || event.altKey || event.metaKey;
  if (busy || event.repeat) return; // a key held down is one answer
  const { candidates } = form.items[place.page];
  if (event.key === "ArrowLeft") back();
  else if (event.key === "ArrowRight") forward();
  else if (event.key === "0") vote(null);
  else if (/^[1-9]$/.test(event.key) && Number(event.key) <= candidates.length) vote(candidates[Number(event.key) - 1]);
});

// After a reload of the page the rater goes on without the first view.
const known = sessionStorage.getItem("rater");
if (known) {
  find("#name").value = known;
  begin(known);
}
