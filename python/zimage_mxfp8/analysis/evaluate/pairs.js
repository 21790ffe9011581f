// Pairs of images: previews where files are missing; views with a slider, flicker (by itself, or by clicks where motion is unwanted).
const PERIOD = 600; // ms
for (const pairs of document.querySelectorAll(".pairs")) {
  const fail = (image) => {
    pairs.querySelector(".alone")?.removeAttribute("hidden");
    if (image.dataset.preview) image.src = image.dataset.preview;
    delete image.dataset.preview;
  };
  for (const image of pairs.querySelectorAll("img")) {
    image.addEventListener("error", () => fail(image));
    if (image.complete && !image.naturalWidth) fail(image); // before this script ran
  }
  const buttons = [...pairs.querySelectorAll("button[data-mode]")];
  const flip = () => pairs.classList.toggle("shows-b");
  let timer = 0;
  for (const button of buttons) {
    button.addEventListener("click", () => {
      pairs.dataset.mode = button.dataset.mode;
      for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
      clearInterval(timer);
      pairs.classList.remove("shows-b");
      const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
      if (button.dataset.mode === "flicker" && !isStill) timer = setInterval(flip, PERIOD);
    });
  }
  for (const stage of pairs.querySelectorAll(".stage")) {
    const slider = stage.querySelector("input");
    slider.addEventListener("input", () => stage.style.setProperty("--at", `${slider.value}%`));
    stage.addEventListener("click", () => {
      if (pairs.dataset.mode !== "flicker") return;
      clearInterval(timer); // from here on by hand
      flip();
    });
  }
}
